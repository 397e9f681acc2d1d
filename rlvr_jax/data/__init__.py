"""Problems, chat prompts, conversations: files to token ids on the host."""
