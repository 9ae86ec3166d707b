"""File formats: keys and files to modules, and back. Never any mathematics."""
