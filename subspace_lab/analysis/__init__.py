"""What features look like and what can be read off them linearly. Tensors and arrays in, numbers out."""
