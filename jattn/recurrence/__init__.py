"""The recurrence engine: linear attention and its relatives as recurrences over a state of fixed size."""
