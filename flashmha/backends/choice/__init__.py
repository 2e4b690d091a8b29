"""Which backend serves a problem: the list, measured tables, wishes and waiting."""
