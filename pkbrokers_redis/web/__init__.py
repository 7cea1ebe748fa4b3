"""The web server: health, candles and closed-candle events over HTTP, and a page. It only reads."""
