"""Import from and export to Hugging Face folders, tensor by tensor, without a GPU or a process group."""
