"""Reports of finished and unfinished runs: terminal, Markdown, CSV, and one HTML page that needs no network."""
