"""Small changes to ops, losses and csrc, each of which the tests must notice; ``python -m mutants`` tries them."""
