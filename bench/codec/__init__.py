"""Speed of codecs and of coding."""
