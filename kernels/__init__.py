"""Fast or lean forms of single computations. They import nothing but MLX."""
