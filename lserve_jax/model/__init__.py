"""The Llama-family decoder: parameters, one forward pass, and the order of its heads."""
