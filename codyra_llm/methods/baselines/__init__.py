"""What other methods are compared with."""
