"""Tasks that the plugin adds to lmms-eval: a folder each, with its YAML and what that calls."""
