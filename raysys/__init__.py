"""raysys: a Ray-native runtime for collaborative, adversarial and agentic learning."""

__version__ = "0.1.0"
