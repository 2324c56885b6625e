// Errors that say op, argument, what was expected, what came, and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sjd {

template <class T>
std::string text(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

inline void check(bool ok, const char* op, const char* argument, const std::string& expected, const std::string& got,
                  const std::string& remedy = "") {
  if (ok) return;
  std::string message = std::string(op) + ": " + argument + " must be " + expected + ", got " + got;
  if (!remedy.empty()) message += "; " + remedy;
  throw std::invalid_argument(message);
}

}  // namespace sjd
