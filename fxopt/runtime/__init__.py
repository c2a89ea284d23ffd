"""fxopt.runtime"""
