"""Bytes: where tensors lie, and how to read, copy and write them. Knows nothing of adapters."""
