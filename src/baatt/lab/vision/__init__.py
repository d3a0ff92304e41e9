"""Questions about real photos and clips with signs planted in them, asked of a small model of LLaDA-V's shape."""
