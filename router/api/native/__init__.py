"""The native API in SGLang's shape: /generate, and verbs for whoever runs the fleet."""
