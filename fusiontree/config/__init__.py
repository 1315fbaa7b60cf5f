"""The configuration of a run: YAML file, overrides, strict validation."""
