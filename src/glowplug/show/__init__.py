"""Programs and reports for people: the steps of each layer, the distinct pieces, and HTML for notebooks."""
