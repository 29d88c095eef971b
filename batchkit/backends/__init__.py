"""One module per backend. A backend knows its dialect and its limits, and nothing of rows or of merging."""
