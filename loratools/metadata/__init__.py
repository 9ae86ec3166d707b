"""The words in a file's header: edited in place, hashes they state, what of them is private, and their dialects."""
