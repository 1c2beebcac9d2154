"""Ray: actors that train blocks, the actor that runs the server, and the arithmetic of resources."""
