//! Model and data set ids -> local files.
