"""The OpenAI-compatible server: an HTTP process over replicas, each a run of its own."""
