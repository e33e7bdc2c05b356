"""What a model knows: medical question sets from local files, asked in the ways that the published systems were."""
