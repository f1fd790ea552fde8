"""A vision-language model as a U that is walked twice: the ViT on the first lap, the language model on the second."""
