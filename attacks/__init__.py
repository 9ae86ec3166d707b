"""Files made to break a reader of safetensors, and a fuzzer of its header. See ``README.md``."""
