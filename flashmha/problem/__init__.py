"""One attention problem as data: who may look at whom, what is added to a score, and all validation."""
