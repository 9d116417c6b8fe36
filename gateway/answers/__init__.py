"""Write answers as the OpenAI API has them, whole or as server-sent events."""
