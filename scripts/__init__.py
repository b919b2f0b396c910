"""Commands: each parses, builds a config and makes one call into the library."""
