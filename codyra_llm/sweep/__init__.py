"""Many runs from one file, and their comparison."""
