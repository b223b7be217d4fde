"""What runs in an HTTP process."""
