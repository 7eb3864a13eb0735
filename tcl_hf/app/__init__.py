"""The HTTP service and the app in a browser, with one model or several behind them."""
