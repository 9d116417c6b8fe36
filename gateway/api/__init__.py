"""Read what HTTP requests ask for: the fields of each route, which of them are refused, and the errors."""
