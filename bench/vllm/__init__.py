"""What vLLM servers with the connector do: asked over HTTP, as clients ask them."""
