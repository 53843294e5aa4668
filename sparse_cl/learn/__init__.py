"""`sparse-cl learn`: one more domain for a model that remembers what it must not forget."""
