"""Layer 2: what clients and server compute, as functions of records and arrays."""
