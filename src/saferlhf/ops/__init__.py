"""Pure functions: tensors and arrays in, tensors and arrays out."""
