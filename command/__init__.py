"""The `gcfg` command: one file for its training commands, one for `gcfg evaluate`, and what it does to single files."""
