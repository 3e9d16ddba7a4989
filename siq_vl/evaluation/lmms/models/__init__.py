"""Models that the plugin adds to lmms-eval: by name, which is that of their module here, their class."""

AVAILABLE_MODELS = {"siq_vl": "SiQVL"}
