"""The same federated work in other systems; each module runs in an environment of its own, without fedsim."""
