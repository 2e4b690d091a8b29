"""One attention problem as data: which query may look at which key, what is added to a score, and all validation."""
