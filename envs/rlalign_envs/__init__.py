"""Small tasks with known answers, for tests, examples and first runs. They import nothing of rlalign."""
