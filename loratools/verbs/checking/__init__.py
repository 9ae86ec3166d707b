"""What ``validate`` checks, one file a concern. Each check is a generator of findings and raises nothing."""
