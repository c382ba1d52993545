"""Operations that families share, each with its gradient: plain sizes and tensors in, no family's configuration."""
