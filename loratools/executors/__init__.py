"""Where steps run. An executor maps a function over items and yields results as they come."""
