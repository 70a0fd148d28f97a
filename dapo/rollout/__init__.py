"""Generation: one `Engine` protocol, a transformers engine and a vLLM engine behind it."""
