"""The web server: health, candles and closed-candle events over HTTP, and a page of them. It only reads."""
