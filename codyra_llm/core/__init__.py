"""What knows nothing of the project: errors, files, safe parsing, schema helpers."""
