"""Configurations: YAML files and `key=value` overrides, checked, and the objects they describe."""
