"""Configurations: checked YAML files and `key=value` overrides, and the objects that they describe."""
