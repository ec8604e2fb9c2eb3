"""The nodes: thin classes that read inputs and call `gcfg` through `runtime`."""
